package ai.lordba.demo.app

import ai.lordba.demo.R
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.lazy.LazyRow
import androidx.compose.foundation.lazy.items
import androidx.compose.material3.FilterChip
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.DisposableEffect
import androidx.compose.ui.Modifier
import androidx.compose.ui.platform.LocalView
import androidx.compose.ui.res.stringResource
import androidx.compose.ui.unit.dp
import java.util.Locale

/** Chips of adapters, of which one is picked; null is none. */
@Composable
fun AdapterChips(
    adapters: List<String>,
    picked: String?,
    noneLabel: String,
    enabled: Boolean,
    onPick: (String?) -> Unit,
) {
    LazyRow(horizontalArrangement = Arrangement.spacedBy(8.dp), modifier = Modifier.fillMaxWidth()) {
        items(listOf(null) + adapters) { name ->
            FilterChip(
                selected = name == picked,
                onClick = { onPick(name) },
                label = { Text(name ?: noneLabel) },
                enabled = enabled,
            )
        }
    }
}

@Composable
fun ErrorText(message: String?) {
    if (message != null) Text(message, color = MaterialTheme.colorScheme.error)
}

@Composable
fun OpenFirst() {
    Text(stringResource(R.string.open_first), style = MaterialTheme.typography.bodyLarge)
}

@Composable
fun ButtonRow(content: @Composable () -> Unit) {
    Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) { content() }
}

/** While shown, the phone does not go to sleep. */
@Composable
fun KeepAwake() {
    val view = LocalView.current
    DisposableEffect(view) {
        view.keepScreenOn = true
        onDispose { view.keepScreenOn = false }
    }
}

/** Bytes as people write them: 134.5 MB, 767.4 kB. */
fun sizeText(bytes: Long): String =
    when {
        bytes >= 1_000_000_000 -> "%.2f GB".format(Locale.ROOT, bytes / 1e9)
        bytes >= 1_000_000 -> "%.1f MB".format(Locale.ROOT, bytes / 1e6)
        bytes >= 1_000 -> "%.1f kB".format(Locale.ROOT, bytes / 1e3)
        else -> "$bytes B"
    }

fun numberText(
    value: Double,
    decimals: Int = 1,
): String = "%.${decimals}f".format(Locale.ROOT, value)
