package system

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// WatchClock calls tell each time that the wall clock is set, until the context ends. tell
// must not block. Slewing does not count as setting. Kernels before 3.0 cause an error.
func WatchClock(ctx context.Context, tell func()) error {
	// A timer that never expires, but is canceled (timerfd_create(2),
	// TFD_TIMER_CANCEL_ON_SET).
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watching the clock: %w", err)
	}
	never := unix.ItimerSpec{Value: unix.Timespec{Sec: 1<<31 - 1}}
	if err := unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &never, nil); err != nil {
		unix.Close(fd)
		return fmt.Errorf("watching the clock: %w", err)
	}
	f := os.NewFile(uintptr(fd), "timerfd")
	stop := context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer f.Close()
		defer stop()
		for buf := make([]byte, 8); ; {
			if _, err := f.Read(buf); !errors.Is(err, unix.ECANCELED) {
				return
			}
			tell()
		}
	}()
	return nil
}
