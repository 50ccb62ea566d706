"""What each command does, in the module of the command's name; heavy libraries load in ``main``."""
