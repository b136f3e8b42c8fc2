"""The GPT, the layers it is made of, and the LSTM that came before. It knows no rank, group or device."""
