// Package conformance runs containerd's own suite for snapshotters against a snapshotter that is already running.
//
// tests/tools/install.sh builds it (go test -c), tests/e2e/tests/conformance.rs starts what answers on the socket and
// runs it. Root is needed, since the suite mounts, and TMPDIR must not be on overlayfs.
package conformance

import (
	"context"
	"flag"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

var (
	socket     = flag.String("socket", "", "socket of the snapshotter (direct), or of a containerd")
	containerd = flag.Bool("containerd", false, "the socket is containerd's: its metadata layer stands between")
	name       = flag.String("snapshotter", "millstream", "name of the snapshotter on the socket")
)

// The suite has one difference by name: it does not rename a directory of a lower layer on what mounts with overlayfs,
// which refuses that without redirect_dir. Millstream's mounts are such mounts.
const suiteName = "overlayfs"

func TestSuite(t *testing.T) {
	if *socket == "" {
		t.Fatal("-socket is missing")
	}
	open := direct
	if *containerd {
		open = throughContainerd
	}
	testsuite.SnapshotterSuite(t, suiteName, open)
}

// direct talks to the snapshotter as containerd itself does. Nobody stands between, so keys are the suite's own: they
// have no `<namespace>/<sequence>/` before them. The namespace is in the header of each call.
func direct(context.Context, string) (snapshots.Snapshotter, func() error, error) {
	connection, err := grpc.NewClient("unix://"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), *name), connection.Close, nil
}

// throughContainerd talks to a containerd that has the snapshotter as a proxy plug-in.
func throughContainerd(context.Context, string) (snapshots.Snapshotter, func() error, error) {
	connection, err := client.New(*socket)
	if err != nil {
		return nil, nil, err
	}
	return connection.SnapshotService(*name), connection.Close, nil
}
