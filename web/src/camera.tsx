// A photo by this machine's camera.

import { useEffect, useRef, useState } from "preact/hooks";
import { Dialog } from "./parts";

export function Camera({ onClose, onDone }: { onClose: () => void; onDone: (url: string) => void }) {
  const video = useRef<HTMLVideoElement>(null);
  const [problem, setProblem] = useState("");
  const [ready, setReady] = useState(false);

  useEffect(() => {
    let stream: MediaStream | undefined;
    let gone = false;
    navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }).then(
      (found) => {
        stream = found;
        if (gone) return found.getTracks().forEach((track) => track.stop());
        video.current!.srcObject = found;
        void video.current!.play();
      },
      (error) => setProblem(`The camera cannot be used: ${error.message || error.name}.`),
    );
    return () => {
      gone = true;
      stream?.getTracks().forEach((track) => track.stop());
    };
  }, []);

  function take() {
    const from = video.current!;
    const scale = Math.min(1, 1344 / Math.max(from.videoWidth, from.videoHeight));
    const canvas = document.createElement("canvas");
    canvas.width = from.videoWidth * scale;
    canvas.height = from.videoHeight * scale;
    canvas.getContext("2d")!.drawImage(from, 0, 0, canvas.width, canvas.height);
    onDone(canvas.toDataURL("image/jpeg", 0.92));
  }

  return (
    <Dialog title="Take a photo" onClose={onClose}>
      {problem ? (
        <p class="problem" role="alert">{problem}</p>
      ) : (
        <video ref={video} muted playsInline aria-label="What the camera sees" onLoadedData={() => setReady(true)} />
      )}
      <footer>
        <button type="button" onClick={onClose}>Cancel</button>
        <button type="button" class="main" disabled={!ready} onClick={take}>Take the photo</button>
      </footer>
    </Dialog>
  );
}
