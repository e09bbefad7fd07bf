"""The study's logic: which learning rates to try, what was fixed when, what came out. Nothing is trained here."""
