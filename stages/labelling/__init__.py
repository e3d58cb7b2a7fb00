"""Human rankings: publish ranking tasks, show them on a web page, store every answer, and measure the agreement of annotators."""
