"""What every operation stands on: the choice of implementation, launches, registration with torch, csrc's library, checks."""
