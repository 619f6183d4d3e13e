"""The embedded default: AWS's protocols on one machine, for the same template, state machine, Lambdas and model code."""
