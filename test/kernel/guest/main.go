// Guest is the only file in the containers of the tests. "listen PORT" greets each client
// as the lab's listeners do, and keeps the connection; "dial ADDRESS:PORT" connects and
// waits for the greeting. "tunnel NAME PORT [PEER]" carries a tun interface's packets in
// UDP, without encryption; without a peer it learns it.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() {
		<-stop
		os.Exit(0)
	}()
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 2 && args[0] == "tunnel" {
		return tunnel(args[1], args[2], args[3:])
	}
	if len(args) != 2 {
		return errors.New("usage: guest listen PORT | dial ADDRESS:PORT | tunnel NAME PORT [PEER]")
	}
	if args[0] == "dial" {
		c, err := net.DialTimeout("tcp", args[1], 10*time.Second)
		if err != nil {
			return err
		}
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		fmt.Print(line)
		return err
	}
	l, err := net.Listen("tcp", ":"+args[1])
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			fmt.Fprintf(c, "port %s\n", args[1])
			io.Copy(io.Discard, c)
		}()
	}
}

func tunnel(name, port string, peer []string) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return err
	}
	tun := os.NewFile(uintptr(fd), "tun")
	outside, err := net.ListenPacket("udp4", ":"+port)
	if err != nil {
		return err
	}
	var to atomic.Pointer[net.UDPAddr]
	if len(peer) > 0 {
		addr, err := net.ResolveUDPAddr("udp4", peer[0])
		if err != nil {
			return err
		}
		to.Store(addr)
	}
	go func() {
		for packet := make([]byte, 2000); ; {
			n, err := tun.Read(packet)
			if addr := to.Load(); err == nil && addr != nil {
				outside.WriteTo(packet[:n], addr)
			}
		}
	}()
	for packet := make([]byte, 2000); ; {
		n, from, err := outside.ReadFrom(packet)
		if err != nil {
			return err
		}
		to.Store(from.(*net.UDPAddr))
		tun.Write(packet[:n])
	}
}
