"""fairseq tasks of this plugin; none yet."""
