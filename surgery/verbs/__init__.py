"""The verbs, each the same as the command of its name.

recipe.yaml + source -> plan -> survey -> operate -> stage -> verify -> publish
"""
