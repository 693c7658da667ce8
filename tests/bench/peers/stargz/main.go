// Command containerd-stargz-grpc serves the stargz snapshotter, as the program of the same name does: that one's module
// has no release on the module proxy, but all it does is to put this library behind a socket. Credentials are left out: the
// registry of the bench wants none.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

func main() {
	address := flag.String("address", "", "unix socket to listen on")
	file := flag.String("config", "", "settings, as those of containerd-stargz-grpc")
	root := flag.String("root", "", "directory of its state")
	flag.Parse()
	if err := run(*address, *file, *root); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-stargz-grpc:", err)
		os.Exit(1)
	}
}

func run(address, file, root string) error {
	var config service.Config
	text, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading the settings: %w", err)
	}
	if err := toml.Unmarshal(text, &config); err != nil {
		return fmt.Errorf("understanding %s: %w", file, err)
	}
	if err := service.Supported(root); err != nil {
		return fmt.Errorf("%s cannot hold snapshots: %w", root, err)
	}
	// As the original does without being told otherwise.
	logrus.SetLevel(logrus.InfoLevel)
	logrus.SetOutput(io.Writer(os.Stderr))
	snapshotter, err := service.NewStargzSnapshotterService(context.Background(), root, &config)
	if err != nil {
		return fmt.Errorf("starting the snapshotter: %w", err)
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	listener, err := net.Listen("unix", address)
	if err != nil {
		return fmt.Errorf("listening on %s: %w", address, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGINT, unix.SIGTERM)
	select {
	case err := <-ended:
		return fmt.Errorf("serving: %w", err)
	case <-asked:
		// Close takes the mounts away.
		return snapshotter.Close()
	}
}
