package system

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// inotify returns a file from which to read events until the context ends. add
// watches a directory, or changes the mask of a watched one.
func inotify(ctx context.Context) (f *os.File, add func(dir string, mask uint32) error, err error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, nil, err
	}
	// An os.File waits without a thread, and Close ends a Read.
	f = os.NewFile(uintptr(fd), "inotify")
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	context.AfterFunc(ctx, func() { f.Close() })
	return f, func(dir string, mask uint32) (err error) {
		e := conn.Control(func(fd uintptr) { _, err = unix.InotifyAddWatch(int(fd), dir, mask) })
		return cmp.Or(e, err)
	}, nil
}

// Watch returns a channel that receives when one of several files of a directory is
// replaced, created or removed, until the context ends. Changes before the next
// receive are merged. The directory must exist; if it is removed and created again, it
// is watched again.
func (s *System) Watch(ctx context.Context, path string, more ...string) (<-chan struct{}, error) {
	dir, name := filepath.Split(s.path(path))
	wanted := []string{name}
	for _, p := range more {
		wanted = append(wanted, filepath.Base(p))
	}
	const mask = unix.IN_MOVED_TO | unix.IN_CLOSE_WRITE | unix.IN_DELETE
	f, add, err := inotify(ctx)
	if err == nil {
		err = add(dir, mask)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("watching %s: %w", path, err)
	}
	changed := make(chan struct{}, 1)
	tell := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	go func() {
		defer f.Close()
		buf := make([]byte, 16<<10)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			named, removed := about(buf[:n], wanted)
			if named || removed {
				tell() // before waiting: the receiver may create the directory again
			}
			for removed && add(dir, mask) != nil {
				select {
				case <-ctx.Done():
					return
				case <-time.After(time.Second):
				}
			}
			if removed {
				tell() // for files that were created before it was watched again
			}
		}
	}()
	return changed, nil
}

// about reports whether one of the events is about a wanted name, or events were lost
// (inotify(7)), and whether the directory itself was removed (IN_IGNORED).
func about(events []byte, wanted []string) (named, removed bool) {
	for len(events) >= unix.SizeofInotifyEvent {
		mask := binary.NativeEndian.Uint32(events[4:])
		length := int(binary.NativeEndian.Uint32(events[12:]))
		events = events[unix.SizeofInotifyEvent:]
		if length > len(events) {
			return true, removed
		}
		name := string(bytes.TrimRight(events[:length], "\x00"))
		named = named || mask&unix.IN_Q_OVERFLOW != 0 || slices.Contains(wanted, name)
		removed = removed || mask&unix.IN_IGNORED != 0
		events = events[length:]
	}
	return named, removed
}

// WatchPaths calls tell when anything is created, changed, replaced or removed in some
// directories, or next to some files, until the context ends. paths returns both, and is called
// again after each event. Links are followed and are watched themselves. A path that does not
// exist is watched once it does. tell must not block. After an error it is never called.
func (s *System) WatchPaths(ctx context.Context, tell func(), paths func() []string) error {
	f, add, err := inotify(ctx)
	if err != nil {
		return fmt.Errorf("watching files: %w", err)
	}
	const created = unix.IN_ONLYDIR | unix.IN_MASK_ADD | unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	const changed = created | unix.IN_ATTRIB | unix.IN_CLOSE_WRITE | unix.IN_MOVED_FROM | unix.IN_DELETE
	// A watched directory stays watched.
	addAll := func() {
		for _, path := range paths() {
			path = s.path(path)
			for range maxLinks {
				// If there is no such file or directory, the nearest one above it is watched.
				mask, dir := uint32(changed), path
				for err := add(dir, mask); err != nil && dir != filepath.Dir(dir); err = add(dir, mask) {
					if dir = filepath.Dir(dir); !errors.Is(err, unix.ENOTDIR) {
						mask = created
					}
				}
				var target string
				if s.Do("readlink", path, func() (err error) { target, err = os.Readlink(path); return err }) != nil {
					break
				}
				add(filepath.Dir(path), changed)
				if !filepath.IsAbs(target) {
					target = filepath.Join(filepath.Dir(path), target)
				}
				path = target
			}
		}
	}
	addAll()
	go func() {
		defer f.Close()
		buf := make([]byte, 16<<10)
		for {
			if _, err := f.Read(buf); err != nil {
				return
			}
			addAll()
			tell()
		}
	}()
	return nil
}

// maxLinks limits the links that lead from one to the next.
const maxLinks = 8
