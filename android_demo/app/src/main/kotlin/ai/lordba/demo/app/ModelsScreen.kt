package ai.lordba.demo.app

import ai.lordba.demo.R
import ai.lordba.demo.core.BundleAdapter
import ai.lordba.demo.core.BundleListing
import ai.lordba.demo.core.Manifest
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.PaddingValues
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.items
import androidx.compose.material3.AlertDialog
import androidx.compose.material3.Button
import androidx.compose.material3.Card
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedButton
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.remember
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.res.stringResource
import androidx.compose.ui.unit.dp
import androidx.lifecycle.compose.collectAsStateWithLifecycle

/** The bundles on the phone: what they hold, whether they are whole, and which one is open. */
@Composable
fun ModelsScreen(
    model: ModelsViewModel,
    modifier: Modifier = Modifier,
) {
    val state by model.state.collectAsStateWithLifecycle()
    val engine by model.engineState.collectAsStateWithLifecycle()
    var doomed by remember { mutableStateOf<BundleListing?>(null) }
    LazyColumn(
        modifier = modifier.fillMaxSize(),
        contentPadding = PaddingValues(16.dp),
        verticalArrangement = Arrangement.spacedBy(12.dp),
    ) {
        item { OutlinedButton(onClick = model::refresh) { Text(stringResource(R.string.refresh)) } }
        if (state.listings?.isEmpty() == true) item { Text(stringResource(R.string.no_models)) }
        item { ErrorText(state.error) }
        items(state.listings.orEmpty(), key = { it.id }) { listing ->
            ModelCard(listing, engine, onOpen = { model.open(listing) }, onDelete = { doomed = listing })
        }
    }
    doomed?.let { listing ->
        DeleteDialog(
            listing,
            onDelete = {
                model.delete(listing)
                doomed = null
            },
            onCancel = { doomed = null },
        )
    }
}

@Composable
private fun ModelCard(
    listing: BundleListing,
    engine: EngineState,
    onOpen: () -> Unit,
    onDelete: () -> Unit,
) {
    Card(modifier = Modifier.fillMaxWidth()) {
        Column(modifier = Modifier.padding(16.dp), verticalArrangement = Arrangement.spacedBy(6.dp)) {
            Text(listing.folder.name, style = MaterialTheme.typography.titleMedium)
            listing.manifest?.let { ManifestLines(it, listing.bytes) }
            ErrorText(listing.problem)
            Progress(listing, engine)
            ButtonRow {
                val isOpen = engine is EngineState.Ready && engine.opened.id == listing.id
                Button(onClick = onOpen, enabled = listing.problem == null && !isOpen) {
                    Text(stringResource(if (isOpen) R.string.is_open else R.string.open))
                }
                TextButton(onClick = onDelete) { Text(stringResource(R.string.delete)) }
            }
        }
    }
}

@Composable
private fun ManifestLines(
    manifest: Manifest,
    bytes: Long,
) {
    Text(stringResource(R.string.model_line, manifest.baseName, manifest.target, manifest.baseQuant, sizeText(bytes)))
    Text(
        stringResource(R.string.base_line, manifest.fingerprint.take(FINGERPRINT_SHOWN)),
        style = MaterialTheme.typography.bodySmall,
    )
    manifest.adapters.forEach { AdapterLine(it) }
}

@Composable
private fun AdapterLine(adapter: BundleAdapter) {
    val smaller = numberText(adapter.fp16LoraBytes.toDouble() / adapter.bytes) + "x"
    Text(
        stringResource(R.string.adapter_line, adapter.name, adapter.r, sizeText(adapter.bytes), smaller),
        style = MaterialTheme.typography.bodySmall,
    )
}

@Composable
private fun Progress(
    listing: BundleListing,
    engine: EngineState,
) {
    when {
        engine is EngineState.Checking && engine.id == listing.id -> {
            Text(stringResource(R.string.checking, sizeText(engine.checked), sizeText(engine.total)))
            LinearProgressIndicator(
                progress = { engine.checked.toFloat() / engine.total.coerceAtLeast(1) },
                modifier = Modifier.fillMaxWidth(),
            )
        }

        engine is EngineState.Loading && engine.id == listing.id -> {
            Text(stringResource(R.string.loading))
            LinearProgressIndicator(modifier = Modifier.fillMaxWidth())
        }

        engine is EngineState.Failed && engine.id == listing.id -> {
            ErrorText(engine.message)
        }
    }
}

@Composable
private fun DeleteDialog(
    listing: BundleListing,
    onDelete: () -> Unit,
    onCancel: () -> Unit,
) {
    AlertDialog(
        onDismissRequest = onCancel,
        text = { Text(stringResource(R.string.delete_question, listing.folder.name)) },
        confirmButton = { TextButton(onClick = onDelete) { Text(stringResource(R.string.delete)) } },
        dismissButton = { TextButton(onClick = onCancel) { Text(stringResource(R.string.cancel)) } },
    )
}

private const val FINGERPRINT_SHOWN = 23 // "sha256:" and 16 digits
