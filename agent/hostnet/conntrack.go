package hostnet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Conntrack is the size and the use of the kernel's table of connections.
type Conntrack struct {
	Max     int `json:"max"`     // entries that it may hold
	Buckets int `json:"buckets"` // of its hash table
	Count   int `json:"count"`   // entries of this network namespace
}

// MinConntrack is how many entries, and how many buckets, are wanted at least.
// As many of one as of the other is the rule of the kernels since 5.15; it
// takes 512 KiB. On small machines the kernel itself settles for 4096.
const MinConntrack = 65536

// conntrackFiles are where the kernel shows the table. Only the initial
// network namespace may write.
type conntrackFiles struct{ max, buckets, count, hashsize string }

func kernelConntrack() conntrackFiles {
	return conntrackFiles{
		max:     "/proc/sys/net/netfilter/nf_conntrack_max",
		buckets: "/proc/sys/net/netfilter/nf_conntrack_buckets",
		count:   "/proc/sys/net/netfilter/nf_conntrack_count",
		// nf_conntrack_buckets is read-only before Linux 4.10.
		hashsize: "/sys/module/nf_conntrack/parameters/hashsize",
	}
}

// ReadConntrack reads the table's size and use. The error is fs.ErrNotExist
// where the kernel does not track connections: its module is not loaded.
func ReadConntrack() (Conntrack, error) { return kernelConntrack().read() }

func (f conntrackFiles) read() (Conntrack, error) {
	var c Conntrack
	for _, v := range []struct {
		to   *int
		path string
	}{{&c.Max, f.max}, {&c.Buckets, f.buckets}, {&c.Count, f.count}} {
		data, err := os.ReadFile(v.path)
		if err != nil {
			return Conntrack{}, fmt.Errorf("reading conntrack's size: %w", err)
		}
		if *v.to, err = strconv.Atoi(strings.TrimSpace(string(data))); err != nil {
			return Conntrack{}, fmt.Errorf("reading conntrack's size from %s: %w", v.path, err)
		}
	}
	return c, nil
}

// GrowConntrack sees that the kernel tracks connections, and makes its table
// larger where it holds fewer than MinConntrack. It returns the size before.
// The error does not keep a ruleset from being loaded: inside a container, for
// one, nobody may change the size.
func GrowConntrack(ctx context.Context, sys *system.System) (before Conntrack, err error) {
	if err := loadConntrack(ctx, sys); err != nil {
		return Conntrack{}, err
	}
	f := kernelConntrack()
	if before, err = f.read(); err != nil {
		return Conntrack{}, err
	}
	return before, f.set(sys, Conntrack{Max: max(before.Max, MinConntrack), Buckets: max(before.Buckets, MinConntrack)})
}

// SetConntrack gives the table a size back.
func SetConntrack(sys *system.System, c Conntrack) error { return kernelConntrack().set(sys, c) }

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
		return fmt.Errorf("sizing conntrack's table for %d connections: %w", want.Max, err)
	}
	return nil
}

// loadConntrack loads the kernel modules that track connections, if they are
// not there: until a stateful rule asks for them, none is, and then there is
// nothing to size or to adopt connections into. Before Linux 4.19 each family
// had a module of its own.
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
		if _, err := os.Stat("/sys/module/" + m); err == nil {
			continue
		}
		// Conntrack may also be built in.
		if _, err := os.Stat(kernelConntrack().max); err == nil && m == "nf_conntrack" {
			continue
		}
		_, err := sys.Run(ctx, system.Command{Name: "modprobe", Args: []string{m}})
		// A kernel without IPv6 has no module for it.
		if err != nil && m != "nf_conntrack_ipv6" {
			return fmt.Errorf("loading the kernel's connection tracking: %w", err)
		}
	}
	return nil
}

// perFamily tells whether a kernel's release is before 4.19.
func perFamily(release string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major < 4 || major == 4 && minor < 19
}
