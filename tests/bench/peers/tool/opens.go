package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/signal"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The runtime makes the mount some ten milliseconds before the program of the container starts.
const (
	look     = time.Millisecond
	patience = time.Minute
)

// opens prints the path of each file that is opened in the file system mounted at point, when it is opened first.
func opens(point string) error {
	if err := awaitMount(point); err != nil {
		return err
	}
	group, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("making a fanotify group: %w", err)
	}
	// The file system, not the mount: the container has a mount of its own.
	if err := unix.FanotifyMark(group, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN, unix.AT_FDCWD, point); err != nil {
		return fmt.Errorf("watching %s: %w", point, err)
	}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGTERM)
	// Ends the read below, with what was read before printed.
	go func() { <-asked; os.Exit(0) }()
	seen := map[string]bool{}
	buffer := make([]byte, 256<<10)
	for {
		n, err := unix.Read(group, buffer)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading events: %w", err)
		}
		if err := report(buffer[:n], seen); err != nil {
			return err
		}
	}
}

func report(events []byte, seen map[string]bool) error {
	for len(events) >= int(unsafe.Sizeof(unix.FanotifyEventMetadata{})) {
		var event unix.FanotifyEventMetadata
		if err := binary.Read(bytes.NewReader(events), binary.NativeEndian, &event); err != nil {
			return err
		}
		if event.Fd >= 0 {
			path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", event.Fd))
			var stat unix.Stat_t
			regular := unix.Fstat(int(event.Fd), &stat) == nil && stat.Mode&unix.S_IFMT == unix.S_IFREG
			unix.Close(int(event.Fd))
			if err == nil && regular && !seen[path] {
				seen[path] = true
				fmt.Println(path)
			}
		}
		events = events[event.Event_len:]
	}
	return nil
}

func awaitMount(point string) error {
	wanted := []byte(" " + point + " ")
	for started := time.Now(); time.Since(started) < patience; time.Sleep(look) {
		table, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return err
		}
		if bytes.Contains(table, wanted) {
			return nil
		}
	}
	return fmt.Errorf("nothing is mounted at %s after %v", point, patience)
}
