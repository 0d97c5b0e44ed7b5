// Command cri asks an image service for an image as the kubelet does, with the credentials of a pod's pull secret, or
// without any when the user is empty; or has it remove one.
package main

import (
	"context"
	"fmt"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cri:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) < 3 {
		return fmt.Errorf("usage: cri SOCKET pull IMAGE USER PASSWORD, or cri SOCKET remove IMAGE")
	}
	connection, err := grpc.NewClient("unix://"+arguments[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	images, image := runtime.NewImageServiceClient(connection), &runtime.ImageSpec{Image: arguments[2]}
	switch {
	case arguments[1] == "pull" && len(arguments) == 5:
		request := &runtime.PullImageRequest{Image: image}
		if arguments[3] != "" {
			request.Auth = &runtime.AuthConfig{Username: arguments[3], Password: arguments[4]}
		}
		answer, err := images.PullImage(context.Background(), request)
		if err != nil {
			return err
		}
		fmt.Println(answer.ImageRef)
		return nil
	case arguments[1] == "remove":
		_, err := images.RemoveImage(context.Background(), &runtime.RemoveImageRequest{Image: image})
		return err
	}
	return fmt.Errorf("no such command: %v", arguments[1:])
}
