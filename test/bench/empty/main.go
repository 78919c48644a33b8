// Command empty does nothing. bench measures the program's start against it.
package main

func main() {}
