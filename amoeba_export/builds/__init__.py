"""Many artifacts from one file: `amoeba.toml`, its lock, the engines that build, and what came of it."""
