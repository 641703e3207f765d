"""A data set looked through before training, with all cores: what it holds, what is wrong, what comes twice."""
