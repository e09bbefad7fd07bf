// Shows the volumes inside this page with NiiVue. No network.
const content = JSON.parse(document.getElementById("content").textContent);
const [cases, labels, view, opacity, status] = ["case", "labels", "view", "opacity", "status"].map((id) =>
  document.getElementById(id),
);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const say = (text) => (status.textContent = text);
let viewer;

const fillLabels = () => {
  const kept = labels.value;
  const names = ["reference", ...Object.keys(content.cases[cases.value].predictions)];
  labels.replaceChildren(...names.map((name, i) => new Option(i ? `prediction: ${name}` : name, name)));
  labels.value = names.includes(kept) ? kept : "reference";
};

const show = async () => {
  const chosen = content.cases[cases.value];
  const overlay = labels.value === "reference" ? chosen.truth : chosen.predictions[labels.value];
  say("loading");
  for (const volume of [...viewer.volumes]) viewer.removeVolume(volume);
  await viewer.loadFromArrayBuffer(bytes(chosen.image), "image.nii.gz");
  await viewer.loadFromArrayBuffer(bytes(overlay), "labels.nii.gz");
  viewer.volumes[1].setColormapLabel(content.colours);
  viewer.setOpacity(1, Number(opacity.value));
  viewer.volumes[0].cal_min = 0;
  viewer.volumes[0].cal_max = 255;
  viewer.scene.crosshairPos = viewer.mm2frac(chosen.centre_mm);
  viewer.updateGLVolume();
  say(`${chosen.what} case, ${chosen.channel}`);
};

const turn = () => {
  const kinds = { axial: 0, coronal: 1, sagittal: 2, multi: 3, render: 4 };
  viewer.setSliceType(kinds[view.value]);
};

const start = async () => {
  cases.replaceChildren(...content.cases.map((c, i) => new Option(`${c.name} (${c.what})`, i)));
  fillLabels();
  viewer = new globalThis.Niivue({
    backColor: [0, 0, 0, 1],
    crosshairColor: [1, 1, 1, 0.6],
    crosshairWidth: 0.4,
    isRadiologicalConvention: true,
    multiplanarShowRender: 1,
    multiplanarLayout: 2,
  });
  await viewer.attachTo("canvas");
  cases.addEventListener("input", () => (fillLabels(), guarded(show)));
  labels.addEventListener("input", () => guarded(show));
  view.addEventListener("input", turn);
  opacity.addEventListener("input", () => viewer.setOpacity(1, Number(opacity.value)));
  await show();
  turn();
};

const guarded = async (work) => {
  try {
    await work();
  } catch (error) {
    say(`The viewer cannot run here (${error.message}); the report has still pictures of these cases.`);
  }
};

guarded(start);
