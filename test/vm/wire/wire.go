// Package wire is the protocol between a boot test and the machine that it
// started: lines of JSON on a virtio-serial port, and the greeting of a
// listener.
package wire

import "time"

// Port is the name of the virtio-serial port.
const Port = "lab"

// Request asks for a shell script to be run as root.
type Request struct {
	ID      int
	Script  string
	Timeout time.Duration
}

// Reply is the result of a request.
type Reply struct {
	ID     int
	Boot   string // the boot that answers
	Output string // standard output and standard error
	Code   int    // exit code, -1 if it was killed or could not be started
}

// Greeting returns the first line that a listener on port sends.
func Greeting(port string) string { return "port " + port + "\n" }
