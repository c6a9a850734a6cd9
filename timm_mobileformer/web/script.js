// The preprocessing is part of the model: this page decodes images, runs the model and shows the results.
const RUNTIME = 'https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/';
const FILES = {  // file of the runtime: [size in bytes, hash]
  'ort.wasm.bundle.min.mjs': [73054, 'sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG'],
  'ort-wasm-simd-threaded.wasm': [14239897, 'sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM'],
};
const MAX_PIXELS = 12e6, MAX_RATIO = 1000;

const [stage, picture, attention, hint, controls, camera, error, status, progress, results, toggle, show] =
  ['stage', 'picture', 'attention', 'hint', 'controls', 'camera', 'error', 'status', 'progress', 'results', 'switch', 'show']
    .map(id => document.getElementById(id));
const input = document.createElement('canvas'), pixels = input.getContext('2d', {willReadFrequently: true});
const shown = picture.getContext('2d'), veil = attention.getContext('2d');
const video = Object.assign(document.createElement('video'), {muted: true, playsInline: true});
const loading = new AbortController();
let ort, session, labels, running = Promise.resolve();
let choice = new AbortController();  // of the file or camera that the user chose last, aborted by the next choice

function complain(reason) {
  error.textContent = reason.message;
  error.hidden = false;
}

// Loading

async function download(url, [size, integrity] = [0, '']) {
  const canHash = globalThis.crypto?.subtle;  // unavailable without HTTPS; the browser then verifies the hash itself
  const chunks = [];
  try {
    const response = await fetch(url, {  // no-cache: a cached file is used only if the server confirms it as current
      cache: 'no-cache', signal: loading.signal, ...canHash ? {} : {integrity},
    });
    if (!response.ok) throw new Error(response.status);
    progress.max += size || Number(response.headers.get('content-length'));
    const reader = response.body.getReader();
    for (let part; !(part = await reader.read()).done; progress.value += part.value.length) chunks.push(part.value);
  } catch (reason) {
    throw new Error(`${url} could not be loaded (${reason.message}). Check the connection and reload the page.`);
  }
  const bytes = await new Blob(chunks).arrayBuffer();
  if (integrity && canHash) {
    const digest = new Uint8Array(await canHash.digest('SHA-384', bytes));
    if (integrity !== `sha384-${btoa(String.fromCharCode(...digest))}`)
      throw new Error(`${url} does not match the expected hash and was rejected.`);
  }
  return bytes;
}

async function load() {
  if (typeof WebAssembly !== 'object')
    throw new Error('This browser cannot run the model: WebAssembly is not supported or disabled.');
  progress.max = 1;
  const [model, about, [code, wasm]] = await Promise.all([
    download('model.onnx'), download('model.onnx.json'),
    Promise.all(Object.entries(FILES).map(([name, check]) => download(RUNTIME + name, check)))]);
  status.textContent = 'Starting the model …';
  progress.removeAttribute('value');
  const script = URL.createObjectURL(new Blob([code], {type: 'text/javascript'}));
  ort = await import(script);
  URL.revokeObjectURL(script);
  Object.assign(ort.env.wasm, {wasmBinary: wasm, numThreads: 1});
  session = await ort.InferenceSession.create(model);
  const {architecture, label_names} = JSON.parse(new TextDecoder().decode(about));
  labels = label_names;
  toggle.hidden = !session.outputNames.includes('attention');
  progress.hidden = true;
  controls.disabled = false;
  status.textContent = `${architecture} is ready: ${labels.length} classes.`;
}

// Classifying

function read(source, width, height) {
  const scale = Math.min(1, Math.sqrt(MAX_PIXELS / width / height));
  input.width = Math.max(1, Math.floor(width * scale));
  input.height = Math.max(1, Math.floor(height * scale));
  pixels.fillStyle = 'white';  // background of transparent images
  pixels.fillRect(0, 0, input.width, input.height);
  pixels.imageSmoothingQuality = 'high';
  pixels.drawImage(source, 0, 0, input.width, input.height);
  const rgba = pixels.getImageData(0, 0, input.width, input.height).data;
  const rgb = new Uint8Array(rgba.length / 4 * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    rgb[j++] = rgba[i];
    rgb[j++] = rgba[i + 1];
    rgb[j++] = rgba[i + 2];
  }
  return new ort.Tensor('uint8', rgb, [input.height, input.width, 3]);
}

function drawAttention(map, crop) {
  const [rows, columns] = map.dims.slice(-2), peak = Math.max(...map.data), heat = new ImageData(columns, rows);
  map.data.forEach((value, i) => heat.data.set([255, 110, 0, 140 * value / peak], 4 * i));
  const small = Object.assign(document.createElement('canvas'), {width: columns, height: rows});
  small.getContext('2d').putImageData(heat, 0, 0);
  const scale = 800 / Math.max(picture.width, picture.height);
  attention.width = Math.max(1, Math.round(picture.width * scale));
  attention.height = Math.max(1, Math.round(picture.height * scale));
  const [top, left, bottom, right] = crop.data.map((value, i) => value * (i % 2 ? attention.width : attention.height));
  veil.fillStyle = 'rgb(0 0 0 / 45%)';  // darken the area outside the crop
  veil.fillRect(0, 0, attention.width, attention.height);
  veil.clearRect(left, top, right - left, bottom - top);
  veil.drawImage(small, left, top, right - left, bottom - top);
}

async function classify(signal, source, width, height, name) {
  if (signal.aborted) return;
  const image = read(source, width, height), start = performance.now();
  const answer = await session.run({image});
  const time = performance.now() - start;
  if (signal.aborted) return;
  [picture.width, picture.height] = [input.width, input.height];
  shown.drawImage(input, 0, 0);
  const best = [...answer.probabilities.data.entries()].sort((a, b) => b[1] - a[1]).slice(0, 5);
  results.replaceChildren(...best.map(([index, probability]) => {
    const item = document.createElement('li'), bar = document.createElement('div');
    const percent = `${(100 * probability).toFixed(1)} %`;
    item.append(Object.assign(document.createElement('span'), {textContent: labels[index]}), ' ', percent, bar);
    item.dataset.probability = probability;
    bar.append(document.createElement('div'));
    bar.firstChild.style.width = percent.replace(' ', '');
    return item;
  }));
  if (answer.attention) drawAttention(answer.attention, answer.crop);
  hint.hidden = true;
  picture.setAttribute('aria-label', name);
  status.textContent =
    source === video ? `${time.toFixed(0)} ms per image` : `${labels[best[0][0]]}, in ${time.toFixed(0)} ms`;
}

function inTurn(...image) {  // a session can only run one image at a time
  return running = running.catch(() => {}).then(() => classify(...image));
}

// Where images come from

async function choose(open, ...args) {
  if (!session) return;
  choice.abort();
  const own = choice = new AbortController();
  error.hidden = true;
  try {
    await open(own.signal, ...args);
  } catch (reason) {
    if (!own.signal.aborted) complain(reason);
  } finally {
    own.abort();
  }
}

async function openFile(signal, file) {
  if (!file) throw new Error('This is not an image. Drop or paste an image file.');
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
  } catch {
    throw new Error(`${file.name} is not an image that this browser can decode.`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
  const {naturalWidth: width, naturalHeight: height} = image;  // after EXIF orientation
  if (Math.max(width, height) > MAX_RATIO * Math.min(width, height))
    throw new Error(`${file.name} has ${width} × ${height} pixels: its aspect ratio is too extreme to be resized.`);
  await inTurn(signal, image, width, height, file.name);
}

async function openCamera(signal) {
  if (!navigator.mediaDevices)
    throw new Error('The camera is only available on https:// and localhost. Choose a photo as a file instead.');
  let stream;
  const stop = () => stream?.getTracks().forEach(track => track.stop());
  camera.setAttribute('aria-pressed', 'true');
  status.setAttribute('aria-live', 'off');  // avoid endless screen reader announcements
  signal.onabort = () => {
    stop();
    video.srcObject = null;
    camera.setAttribute('aria-pressed', 'false');
    status.setAttribute('aria-live', 'polite');
  };
  try {
    stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
  } catch (reason) {
    throw new Error({
      NotAllowedError: 'Camera access was denied. Allow it for this page in the browser settings.',
      NotFoundError: 'No camera was found.',
    }[reason.name] ?? `The camera cannot be used (${reason.message}).`);
  }
  if (signal.aborted) return stop();  // during the permission prompt
  video.srcObject = stream;
  await video.play();
  while (stream.active && !signal.aborted) {
    await inTurn(signal, video, video.videoWidth, video.videoHeight, 'Camera');
    await new Promise(requestAnimationFrame);
  }
}

for (const chooser of document.querySelectorAll('input[type=file]'))
  chooser.onchange = () => {
    if (chooser.files.length) choose(openFile, chooser.files[0]);
    chooser.value = '';  // allow choosing the same file again
  };
camera.onclick = () => camera.getAttribute('aria-pressed') === 'true' ? choice.abort() : choose(openCamera);
show.onchange = () => attention.hidden = !show.checked;
document.onpaste = event => choose(openFile, event.clipboardData.files[0]);
document.ondragover = event => {
  event.preventDefault();
  document.body.classList.add('dragging');
};
document.ondragleave = () => document.body.classList.remove('dragging');
document.ondrop = event => {
  event.preventDefault();
  document.ondragleave();
  choose(openFile, event.dataTransfer.files[0]);
};
load().catch(reason => {
  loading.abort();  // the other downloads
  progress.hidden = true;
  status.textContent = 'The model could not be started.';
  complain(reason);
});
