"""scalepeft: a YAML recipe goes in; a trained, evaluated and verified adapter comes out."""

__version__ = "0.1.0"
