"""TensorBoard event files without TensorBoard: records, the canonical series of a run, and the check of its files."""
