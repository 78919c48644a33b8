package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Conntrack is the size and use of the kernel's conntrack table.
type Conntrack struct {
	Max     int `json:"max"`               // maximum number of entries
	Buckets int `json:"buckets,omitempty"` // of its hash table
	Count   int `json:"count"`             // entries of this network namespace
}

// MinConntrack is the minimum number of entries and of buckets. Kernels since 5.15
// use as many buckets as entries; 65536 take 512 KiB. The kernel's own choice on
// small machines is 4096.
const MinConntrack = 65536

// conntrackFiles are the kernel's files about the table. Only the initial network
// namespace may write to them.
type conntrackFiles struct{ max, buckets, count, hashsize string }

var kernelConntrack = conntrackFiles{
	max:     "/proc/sys/net/netfilter/nf_conntrack_max",
	buckets: "/proc/sys/net/netfilter/nf_conntrack_buckets",
	count:   "/proc/sys/net/netfilter/nf_conntrack_count",
	// nf_conntrack_buckets is read-only before Linux 4.10.
	hashsize: "/sys/module/nf_conntrack/parameters/hashsize",
}

// ReadConntrack returns the table's size and use. The error is fs.ErrNotExist if the
// conntrack module is not loaded.
func ReadConntrack() (Conntrack, error) { return kernelConntrack.read() }

func (f conntrackFiles) read() (Conntrack, error) {
	var c Conntrack
	for _, v := range []struct {
		to   *int
		path string
	}{{&c.Max, f.max}, {&c.Buckets, f.buckets}, {&c.Count, f.count}} {
		data, err := os.ReadFile(v.path)
		if err != nil {
			return Conntrack{}, fmt.Errorf("reading the conntrack table's size: %w", err)
		}
		if *v.to, err = strconv.Atoi(strings.TrimSpace(string(data))); err != nil {
			return Conntrack{}, fmt.Errorf("reading the conntrack table's size from %s: %w", v.path, err)
		}
	}
	return c, nil
}

// ConntrackTable changes the kernel's conntrack table.
type ConntrackTable struct{ System *system.System }

// Grow makes the kernel track connections, and enlarges its table to at least
// MinConntrack entries. It returns the previous size. After an error a ruleset can
// still be loaded: inside a container, for example, the size cannot be changed.
func (t ConntrackTable) Grow(ctx context.Context) (before Conntrack, err error) {
	if err := loadConntrack(ctx, t.System); err != nil {
		return Conntrack{}, err
	}
	f := kernelConntrack
	if before, err = f.read(); err != nil {
		return Conntrack{}, err
	}
	return before, f.set(t.System, Conntrack{Max: max(before.Max, MinConntrack), Buckets: max(before.Buckets, MinConntrack)})
}

// Set changes the table's size to that of c.
func (t ConntrackTable) Set(c Conntrack) error { return kernelConntrack.set(t.System, c) }

func (f conntrackFiles) set(sys *system.System, want Conntrack) error {
	have, err := f.read()
	if err != nil {
		return err
	}
	var errs []error
	if have.Buckets != want.Buckets {
		errs = append(errs, sys.WriteKernel(f.hashsize, strconv.Itoa(want.Buckets)))
	}
	if have.Max != want.Max {
		errs = append(errs, sys.WriteKernel(f.max, strconv.Itoa(want.Max)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("setting the conntrack table's size to %d: %w", want.Max, err)
	}
	return nil
}

// loadConntrack loads the kernel's conntrack modules if necessary. They are missing
// until a stateful rule needs them; until then there is no table to enlarge or to
// add connections to. Before Linux 4.19 each family has its own module.
func loadConntrack(ctx context.Context, sys *system.System) error {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return fmt.Errorf("reading the kernel's version: %w", err)
	}
	modules := []string{"nf_conntrack"}
	if perFamily(string(release)) {
		modules = append(modules, "nf_conntrack_ipv4", "nf_conntrack_ipv6")
	}
	for _, m := range modules {
		_, noModule := os.Stat("/sys/module/" + m)
		_, notBuiltIn := os.Stat(kernelConntrack.max) // conntrack may also be built in
		if noModule == nil || notBuiltIn == nil && m == "nf_conntrack" {
			continue
		}
		_, err := sys.Run(ctx, system.Command{Name: "modprobe", Args: []string{m}})
		// A kernel without IPv6 has no module for it.
		if err != nil && m != "nf_conntrack_ipv6" {
			return fmt.Errorf("loading the conntrack module: %w", err)
		}
	}
	return nil
}

// perFamily reports whether a kernel release is older than 4.19.
func perFamily(release string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major < 4 || major == 4 && minor < 19
}
