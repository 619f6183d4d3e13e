"""The offline proof that a stage will work on AWS: ``python -m infra.verify``, which ``make verify`` runs. Deploys nothing."""
