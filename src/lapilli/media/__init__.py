"""Where the bytes of a medium come from, with limits; what a picture is stands in modality."""
