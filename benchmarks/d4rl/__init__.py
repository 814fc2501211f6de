"""The paper's control experiments: from an offline dataset to a scored policy."""
