"""What fine-tuning adds to pretraining (llm/train): data of examples, of which the answers alone are learnt."""
