//go:build linux

package main

import (
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// faults makes the program of the tests record each of its steps and fail at one of
// them, as the environment specifies:
//
//	FAULT_STEPS  the file that gets a line for each step, before it is done
//	FAULT_AT     a line of that file: the step that fails
//	FAULT_HOW    "killed before", "killed after", or an errno's name
func faults() system.Step {
	list := os.Getenv("FAULT_STEPS")
	if list == "" {
		return nil
	}
	log, err := os.OpenFile(list, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		panic(err)
	}
	at, how := os.Getenv("FAULT_AT"), os.Getenv("FAULT_HOW")
	errnos := map[string]error{"ENOSPC": syscall.ENOSPC, "EIO": syscall.EIO, "EROFS": syscall.EROFS, "EACCES": syscall.EACCES}
	kill := func() error {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	// Both families are read at the same time, so a step is identified by what it does
	// and how often that was done before.
	var mu sync.Mutex
	done := map[string]int{}
	return func(op, name string, do func() error) error {
		mu.Lock()
		done[op+name]++
		step := fmt.Sprintf("%s %s (%d)", op, name, done[op+name])
		kind := "changes"
		if lab.Looks(op) {
			kind = "looks"
		}
		fmt.Fprintf(log, "%s\t%s\n", kind, step)
		mu.Unlock()
		switch {
		case step != at:
			return do()
		case how == "killed before":
			return kill()
		case how == "killed after":
			do()
			return kill()
		}
		return errnos[how]
	}
}
