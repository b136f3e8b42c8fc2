"""Raw pages to text: archives, HTML, charsets."""
