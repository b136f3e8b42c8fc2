"""The GPT and the layers it is made of. It knows no rank, group or device."""
