"""The language of recipes: kinds of field, YAML, and saying what is wrong with a file by line and key.

The whole recipe of a conversion is `steps.recipe.Recipe`; operations, gates and tuning each bring their own part.
"""
