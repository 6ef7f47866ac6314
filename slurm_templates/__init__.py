"""Data only: the sbatch templates (Jinja2) and the instances (YAML) that ship with the launcher."""
