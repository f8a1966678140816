"""In which order rows start: one function per file, of the file's name, from JobFacts to Order."""
