package system

import (
	"os"
	"regexp"
	"strconv"
	"testing"
)

// TestFreeMemory checks that the program's code is no longer resident, and still runs.
func TestFreeMemory(t *testing.T) {
	resident := func() int {
		t.Helper()
		data, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`RssFile:\s+(\d+) kB`).FindSubmatch(data)
		if m == nil {
			t.Fatalf("no RssFile in\n%s", data)
		}
		n, err := strconv.Atoi(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	resident() // its code is mapped
	before := resident()
	FreeMemory()
	if after := resident(); after >= before {
		t.Errorf("%d kB of the program are resident, before %d", after, before)
	}
}
