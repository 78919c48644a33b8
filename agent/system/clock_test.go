package system

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// Each setting of the clock is reported, and the end of the context ends the watch. The test
// sets the clock to the time that it shows, where it may.
func TestWatchClock(t *testing.T) {
	goroutines := runtime.NumGoroutine()
	ctx, cancel := context.WithCancel(context.Background())
	told := make(chan struct{}, 10)
	if err := WatchClock(ctx, func() { told <- struct{}{} }); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		now := unix.NsecToTimespec(time.Now().UnixNano())
		err := unix.ClockSettime(unix.CLOCK_REALTIME, &now)
		if errors.Is(err, unix.EPERM) {
			break
		}
		select {
		case <-told:
		case <-time.After(10 * time.Second):
			t.Error("the setting is not reported")
		}
	}
	cancel()
	lab.Poll(t, "the watch to end", func() bool { return runtime.NumGoroutine() <= goroutines })
	if len(told) > 0 {
		t.Error("reported too often")
	}
}
