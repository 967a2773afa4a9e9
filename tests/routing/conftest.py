from hypothesis import settings

# A shared machine may stall any example for longer than hypothesis allows; failing seeds are printed, to be replayed.
settings.register_profile("llmasos", deadline=None, print_blob=True)
settings.load_profile("llmasos")
