"""Operators that draw at random, and others that are known and not computed."""

from __future__ import annotations

from edgekit.graph.interpreter.registry import refuse

refuse(
    *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    reason="its values are random, so no two runs agree",
)
refuse("StringConcat", "StringNormalizer", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", reason="it works on strings")
refuse("ImageDecoder", reason="it decodes image files")
refuse("MaxRoiPool", reason="its bins are not specified exactly")
