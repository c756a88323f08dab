"""Where text comes from: files of the user, data sets of the hub, the built-in corpus, pinned packages."""
