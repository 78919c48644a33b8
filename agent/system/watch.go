package system

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Watch tells when one of several files of a directory is replaced, made or
// removed, until the context ends. Changes that come while one has not been
// taken yet are one. The directory must be there.
func (s *System) Watch(ctx context.Context, path string, more ...string) (<-chan struct{}, error) {
	dir, name := filepath.Split(s.Path(path))
	wanted := []string{name}
	for _, p := range more {
		wanted = append(wanted, filepath.Base(p))
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	// A file of Go's waits without a thread, and Close ends a Read.
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO|unix.IN_CLOSE_WRITE|unix.IN_DELETE); err != nil {
		f.Close()
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	changed := make(chan struct{}, 1)
	context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer f.Close()
		buf := make([]byte, 16<<10)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			if !names(buf[:n], wanted) {
				continue
			}
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}()
	return changed, nil
}

// names tells whether one of the events is about one of some names, or whether
// events were lost (inotify(7)).
func names(events []byte, wanted []string) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		mask := binary.NativeEndian.Uint32(events[4:])
		length := int(binary.NativeEndian.Uint32(events[12:]))
		events = events[unix.SizeofInotifyEvent:]
		if length > len(events) {
			return true
		}
		if mask&unix.IN_Q_OVERFLOW != 0 || slices.Contains(wanted, string(bytes.TrimRight(events[:length], "\x00"))) {
			return true
		}
		events = events[length:]
	}
	return false
}

// WatchDirs calls tell when anything in some directories is made, changed,
// replaced or removed, until the context ends. A directory that is not there is
// watched once it is, if its parent is among them. tell must not wait. The error
// says that nothing will be told.
func (s *System) WatchDirs(ctx context.Context, tell func(), dirs ...string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watching files: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	// One that is watched already stays so.
	add := func() {
		conn.Control(func(fd uintptr) {
			for _, dir := range dirs {
				unix.InotifyAddWatch(int(fd), s.Path(dir), unix.IN_ONLYDIR|unix.IN_ATTRIB|
					unix.IN_CREATE|unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_DELETE)
			}
		})
	}
	add()
	context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer f.Close()
		buf := make([]byte, 16<<10)
		for {
			if _, err := f.Read(buf); err != nil {
				return
			}
			add()
			tell()
		}
	}()
	return nil
}
