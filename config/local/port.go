package local

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// loopback is where everything listens: nothing here is meant for anybody outside this machine, unless it is said.
const loopback = "127.0.0.1"

var given struct {
	sync.Mutex
	ports map[int]bool
}

// FreePort picks a port that nothing listens on and that this process has not been given before. It lies below the range
// from which the kernel takes the ports of outgoing connections: otherwise a client that keeps dialling a killed server
// would some day be given that very port, and be connected to itself.
func FreePort() (int, error) {
	given.Lock()
	defer given.Unlock()
	if given.ports == nil {
		given.ports = map[int]bool{}
	}
	for range 1000 {
		port := 15000 + rand.IntN(17000)
		if !given.ports[port] && portFree(net.JoinHostPort(loopback, strconv.Itoa(port))) == nil {
			given.ports[port] = true
			return port, nil
		}
	}
	return 0, errors.New("pick a free port: none found between 15000 and 32000")
}

// portFree returns an error that names the port, and its holder where that can be found out, unless addr can be listened
// on. No addr is free.
func portFree(addr string) error {
	if addr == "" {
		return nil
	}
	l, err := net.Listen("tcp", addr)
	if err == nil {
		return l.Close()
	}
	_, port, _ := net.SplitHostPort(addr)
	if holder := portHolder(port); holder != "" {
		return fmt.Errorf("port %s is taken by %s", port, holder)
	}
	return fmt.Errorf("port %s is taken: %w", port, err)
}

// awaitPort waits until what a killed process listened on is free, which the kernel may take a moment for.
func awaitPort(addr string) error {
	var err error
	for range 200 {
		if err = portFree(addr); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

func connects(ctx context.Context, addr string) error {
	if addr == "" {
		return nil
	}
	c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return c.Close()
}

// listener is a TCP socket that is listened on.
type listener struct {
	ip    net.IP
	port  int
	inode string
}

// listeners lists all of this machine's (rather: of this network namespace's).
func listeners() []listener {
	var all []listener
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			const listen = "0A"
			if len(f) < 10 || f[3] != listen {
				continue
			}
			addr, port, _ := strings.Cut(f[1], ":")
			n, err := strconv.ParseInt(port, 16, 32)
			if err != nil {
				continue
			}
			all = append(all, listener{ip: procIP(addr), port: int(n), inode: f[9]})
		}
	}
	return all
}

// procIP reads an address as /proc/net writes it: words of four bytes, each in this machine's (little endian) order.
func procIP(hex string) net.IP {
	ip := make(net.IP, 0, net.IPv6len)
	for ; len(hex) >= 8; hex = hex[8:] {
		w, err := strconv.ParseUint(hex[:8], 16, 32)
		if err != nil {
			return nil
		}
		ip = append(ip, byte(w), byte(w>>8), byte(w>>16), byte(w>>24))
	}
	return ip
}

// portHolder says which process listens on the port, or nothing if that can't be seen.
func portHolder(port string) string {
	for _, l := range listeners() {
		if strconv.Itoa(l.port) != port {
			continue
		}
		fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && to == "socket:["+l.inode+"]" {
				return holder(strings.Split(fd, "/")[2])
			}
		}
	}
	return ""
}

// holder is how people know a process: by what it is in Isobar, if it is one of ours, else by its command line.
func holder(pid string) string {
	env, _ := os.ReadFile("/proc/" + pid + "/environ")
	for v := range strings.SplitSeq(string(env), "\x00") {
		if ours, ok := strings.CutPrefix(v, tag+"="); ok {
			parts := strings.SplitN(ours, "-", 3) // as spawn makes it
			return fmt.Sprintf("process %s (the %s of an Isobar that runs as process %s)", pid, parts[len(parts)-1], parts[0])
		}
	}
	line, _ := os.ReadFile("/proc/" + pid + "/cmdline")
	return fmt.Sprintf("process %s (%.80s)", pid, strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " ")))
}
