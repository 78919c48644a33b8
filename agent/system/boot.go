package system

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Boot names this boot, differently from any other, and tells how long ago it
// began, time in suspend included (proc(5), clock_gettime(2)). No change of the
// clock moves that.
func Boot() (name string, uptime time.Duration, err error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", 0, fmt.Errorf("reading which boot this is: %w", err)
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return "", 0, fmt.Errorf("reading the time since boot: %w", err)
	}
	return strings.TrimSpace(string(id)), time.Duration(ts.Nano()), nil
}
