"""What CPLearn is compared with (paper, Tables 1 to 3): one file a method, each with the interface of `method.Method`."""
