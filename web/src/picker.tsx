// Pictures of a question: chosen, dropped, pasted, drawn, photographed.

import { useEffect, useRef, useState } from "preact/hooks";
import { Camera } from "./camera";
import { Drawing } from "./drawing";
import { Icon } from "./parts";
import { readPicture } from "./pictures";
import { newId, type Picture } from "./types";

interface Props {
  pictures: Picture[];
  active: boolean; // whether what is dropped and pasted is meant for it
  onChange: (change: (pictures: Picture[]) => Picture[]) => void;
}

export function Picker({ pictures, active, onChange }: Props) {
  const [open, setOpen] = useState<"" | "drawing" | "camera">("");
  const [problem, setProblem] = useState("");
  const [isOver, setOver] = useState(false);
  const files = useRef<HTMLInputElement>(null);
  const photo = useRef<HTMLInputElement>(null);

  const add = (picture: Picture) => onChange((before) => [...before, picture]);

  async function read(list: Iterable<File>) {
    setProblem("");
    for (const file of list) {
      try {
        add(await readPicture(file, file.name || "pasted picture"));
      } catch (error) {
        setProblem((error as Error).message);
      }
    }
  }

  useEffect(() => {
    if (!active) return;
    const hasFiles = (event: DragEvent) => !!event.dataTransfer?.types.includes("Files");
    const paste = (event: ClipboardEvent) => {
      const found = [...(event.clipboardData?.files ?? [])];
      if (!found.length) return;
      event.preventDefault();
      void read(found);
    };
    const over = (event: DragEvent) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setOver(true);
    };
    const leave = (event: DragEvent) => event.relatedTarget === null && setOver(false);
    const drop = (event: DragEvent) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setOver(false);
      void read([...event.dataTransfer!.files]);
    };
    const listeners = { paste, dragover: over, dragleave: leave, drop } as Record<string, EventListener | any>;
    for (const [name, listener] of Object.entries(listeners)) document.addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(listeners)) document.removeEventListener(name, listener);
    };
  }, [active]);

  function photograph() {
    const isPhone = matchMedia("(pointer: coarse)").matches; // its own camera program is the better one
    if (isPhone || !navigator.mediaDevices) photo.current!.click();
    else setOpen("camera");
  }

  function chosen(event: Event) {
    const input = event.currentTarget as HTMLInputElement;
    void read([...input.files!]);
    input.value = "";
  }

  return (
    <div class="picker">
      {pictures.length > 0 && (
        <ul class="thumbs" aria-label="Pictures of this question">
          {pictures.map((one) => (
            <li key={one.id}>
              <img src={one.url} alt={one.name} />
              <button
                type="button"
                aria-label={`Remove ${one.name}`}
                onClick={() => onChange((before) => before.filter((other) => other.id !== one.id))}
              >
                <Icon name="close" />
              </button>
            </li>
          ))}
        </ul>
      )}
      {problem && <p class="problem" role="alert">{problem}</p>}
      <div class="row">
        <button type="button" class="plain" onClick={() => files.current!.click()}>
          <Icon name="image" /> Picture
        </button>
        <button type="button" class="plain" onClick={() => setOpen("drawing")}>
          <Icon name="draw" /> Draw
        </button>
        <button type="button" class="plain" onClick={photograph}>
          <Icon name="camera" /> Photo
        </button>
        <input ref={files} class="file" type="file" accept="image/*" multiple hidden aria-label="Choose pictures" onChange={chosen} />
        <input ref={photo} type="file" accept="image/*" capture="environment" hidden aria-label="Take a photo" onChange={chosen} />
      </div>
      {isOver && <div class="drop" aria-hidden="true">Drop pictures here</div>}
      {open === "drawing" && (
        <Drawing onClose={() => setOpen("")} onDone={(picture) => (add(picture), setOpen(""))} />
      )}
      {open === "camera" && (
        <Camera
          onClose={() => setOpen("")}
          onDone={(url) => (add({ id: newId(), name: "photo", url }), setOpen(""))}
        />
      )}
    </div>
  );
}
