// Command guest runs in the virtual machine of a boot test. It is the
// listeners that a firewall has to hide, and runs commands that do not arrive
// over the network.
//
//	guest listen PORT...   serve TCP ports on all addresses of both families
//	guest serve NAME       run commands that arrive on a virtio-serial port
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/basicfw/basicfw-agent/test/vm/wire"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: guest listen PORT... | guest serve NAME")
	}
	var err error
	switch os.Args[1] {
	case "listen":
		err = listen(os.Args[2:])
	case "serve":
		err = serve(os.Args[2])
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	log.Fatal(err)
}

// listen serves the ports and notifies systemd once all of them are open.
func listen(ports []string) error {
	for _, port := range ports {
		for _, network := range []string{"tcp4", "tcp6"} {
			l, err := net.Listen(network, ":"+port)
			if err != nil {
				return err
			}
			go func() { log.Fatal(greet(l, port)) }()
		}
	}
	if err := ready(); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	select {}
}

// greet sends the port's name to each client, and echoes what it sends.
func greet(l net.Listener, port string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if _, err := io.WriteString(c, wire.Greeting(port)); err != nil {
				return
			}
			io.Copy(c, c)
		}()
	}
}

// ready sends READY=1 (sd_notify(3)), if systemd is to be told.
func ready() error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	c, err := net.Dial("unixgram", path)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.WriteString(c, "READY=1")
	return err
}

// serve answers as long as the machine runs. The port exists once udev has
// seen it, and returns end of file while its other end is closed.
func serve(name string) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	for {
		// Opened by hand to stay in blocking mode: the kernel reports a port
		// without a peer as hung up for good.
		fd, err := syscall.Open("/dev/virtio-ports/"+name, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		if err == nil {
			port := os.NewFile(uintptr(fd), name)
			answer(port, string(bytes.TrimSpace(boot)))
			port.Close()
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// answer reads requests until the port ends, and runs them concurrently.
// An invalid request is the rest of one that was cut off by a reboot.
func answer(port io.ReadWriter, boot string) {
	var one sync.Mutex // reply at a time
	replies := json.NewEncoder(port)
	requests := bufio.NewReader(port)
	for {
		line, err := requests.ReadBytes('\n')
		if err != nil {
			return
		}
		var q wire.Request
		if json.Unmarshal(line, &q) != nil {
			continue
		}
		go func() {
			r := run(q)
			r.Boot = boot
			one.Lock()
			defer one.Unlock()
			replies.Encode(r) // fails if the port has ended, when no call waits
		}()
	}
}

// run runs a script with a deadline, and returns its output.
func run(q wire.Request) wire.Reply {
	ctx, cancel := context.WithTimeout(context.Background(), q.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", q.Script)
	cmd.Env = []string{"LC_ALL=C", "HOME=/root", "NO_COLOR=1", "SYSTEMD_COLORS=0", "SYSTEMD_PAGER=",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	r := wire.Reply{ID: q.ID, Output: string(out), Code: cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.Code, r.Output = -1, r.Output+err.Error()
	}
	return r
}
