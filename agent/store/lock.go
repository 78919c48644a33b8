package store

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Lock makes sure that one change is made at a time, by this program in any of
// its runs. It waits until the context ends; the error then says who holds it.
// The function that it gives back lets go.
func (s *Store) Lock(ctx context.Context, command string) (unlock func(), err error) {
	if err := s.sys.MkdirAll(RunDir, 0o755); err != nil {
		return nil, err
	}
	start := time.Now()
	release, err := s.sys.Lock(ctx, lockFile, fmt.Sprintf("%d %s\n", os.Getpid(), command))
	if err != nil {
		if ctx.Err() == nil {
			return nil, err
		}
		return nil, fmt.Errorf("another change has been under way for more than %v, %s: try again when it has ended",
			time.Since(start).Round(time.Millisecond), s.holder())
	}
	return release, nil
}

// holder says who wrote their name into the lock last.
func (s *Store) holder() string {
	data, err := s.sys.ReadLimited(lockFile, 256)
	pid, command, ok := strings.Cut(strings.TrimSpace(string(data)), " ")
	if n, e := strconv.Atoi(pid); err != nil || !ok || e != nil || n <= 0 {
		return "held by a process that left no name"
	}
	return fmt.Sprintf("held by process %s: basicfw-agent %s", pid, system.Printable(command))
}
