package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type document = map[string]any

const tagAnnotation = "org.opencontainers.image.ref.name"

// layout is a directory in the format of OCI image layouts.
type layout string

func (l layout) blob(digest string) string {
	return filepath.Join(string(l), "blobs", strings.Replace(digest, ":", "/", 1))
}

// convert does with the estargz library what `ctr-remote image convert` and `optimize` do: every layer becomes an eStargz;
// files of the list come first, in its order, in the topmost layer that has them.
func convert(dir, tag, newTag, list string) error {
	l := layout(dir)
	var index struct {
		SchemaVersion int          `json:"schemaVersion"`
		Manifests     []descriptor `json:"manifests"`
	}
	if err := readJSON(filepath.Join(dir, "index.json"), &index); err != nil {
		return err
	}
	at := position(index.Manifests, tag)
	if at < 0 {
		return fmt.Errorf("%s has no image %s", dir, tag)
	}
	first, err := readList(list)
	if err != nil {
		return err
	}
	converted, err := l.convertManifest(index.Manifests[at], first)
	if err != nil {
		return err
	}
	converted.Annotations = map[string]string{tagAnnotation: newTag}
	if old := position(index.Manifests, newTag); old >= 0 {
		index.Manifests[old] = converted
	} else {
		index.Manifests = append(index.Manifests, converted)
	}
	bytes, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "index.json"), bytes, 0o644)
}

func position(manifests []descriptor, tag string) int {
	for at, manifest := range manifests {
		if manifest.Annotations[tagAnnotation] == tag {
			return at
		}
	}
	return -1
}

func (l layout) convertManifest(old descriptor, first []string) (descriptor, error) {
	var manifest struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}
	var config document
	if err := readJSON(l.blob(old.Digest), &manifest); err != nil {
		return descriptor{}, err
	}
	if err := readJSON(l.blob(manifest.Config.Digest), &config); err != nil {
		return descriptor{}, err
	}
	diffIDs := make([]string, len(manifest.Layers))
	// From the top: what a layer has is not looked for below it.
	for at := len(manifest.Layers) - 1; at >= 0; at-- {
		layer, diffID, missed, err := l.convertLayer(manifest.Layers[at], first)
		if err != nil {
			return descriptor{}, fmt.Errorf("converting %s: %w", manifest.Layers[at].Digest, err)
		}
		manifest.Layers[at], diffIDs[at], first = layer, diffID, missed
	}
	config["rootfs"] = document{"type": "layers", "diff_ids": diffIDs}
	var err error
	if manifest.Config, err = l.writeJSON(config, manifest.Config.MediaType); err != nil {
		return descriptor{}, err
	}
	return l.writeJSON(manifest, old.MediaType)
}

func (l layout) convertLayer(old descriptor, first []string) (descriptor, string, []string, error) {
	fail := func(err error) (descriptor, string, []string, error) { return descriptor{}, "", nil, err }
	file, err := os.Open(l.blob(old.Digest))
	if err != nil {
		return fail(err)
	}
	defer file.Close()
	var missed []string
	options := []estargz.Option{estargz.WithAllowPrioritizeNotFound(&missed)}
	if len(first) > 0 {
		options = append(options, estargz.WithPrioritizedFiles(first))
	}
	blob, err := estargz.Build(io.NewSectionReader(file, 0, old.Size), options...)
	if err != nil {
		return fail(err)
	}
	defer blob.Close()
	layer, err := l.write(blob, old.MediaType)
	if err != nil {
		return fail(err)
	}
	if err := blob.Close(); err != nil {
		return fail(err)
	}
	size, err := blob.UncompressedSize()
	if err != nil {
		return fail(err)
	}
	layer.Annotations = map[string]string{
		estargz.TOCJSONDigestAnnotation:         blob.TOCDigest().String(),
		estargz.StoreUncompressedSizeAnnotation: fmt.Sprint(size),
	}
	return layer, blob.DiffID().String(), missed, nil
}

func (l layout) writeJSON(value any, mediaType string) (descriptor, error) {
	bytes, err := json.Marshal(value)
	if err != nil {
		return descriptor{}, err
	}
	return l.write(strings.NewReader(string(bytes)), mediaType)
}

func (l layout) write(from io.Reader, mediaType string) (descriptor, error) {
	file, err := os.CreateTemp(filepath.Join(string(l), "blobs/sha256"), "making-")
	if err != nil {
		return descriptor{}, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	hash := sha256.New()
	size, err := io.Copy(io.MultiWriter(file, hash), from)
	if err != nil {
		return descriptor{}, err
	}
	digest := "sha256:" + hex.EncodeToString(hash.Sum(nil))
	if err := file.Chmod(0o644); err != nil {
		return descriptor{}, err
	}
	return descriptor{MediaType: mediaType, Digest: digest, Size: size}, os.Rename(file.Name(), l.blob(digest))
}

func readList(file string) ([]string, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, line := range strings.Split(string(text), "\n") {
		if line != "" {
			paths = append(paths, strings.TrimPrefix(line, "/"))
		}
	}
	return paths, nil
}

func readJSON(file string, into any) error {
	bytes, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(bytes, into); err != nil {
		return fmt.Errorf("understanding %s: %w", file, err)
	}
	return nil
}
