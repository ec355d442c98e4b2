"""The student: a small encoder, trained on the teacher's labels and exported as a plain model."""
