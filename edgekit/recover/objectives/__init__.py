"""What a student is trained towards: each objective is small, named, and takes what was observed of student and teacher."""
