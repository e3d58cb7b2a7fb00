"""Human rankings: publish tasks, show them on a web page, store the answers, measure the agreement of annotators."""
